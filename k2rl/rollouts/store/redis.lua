-- What a RedisStore does, each function in one step. KEYS[1] is the run's prefix.
--   numbers    hash    id -> its place in the order of asking
--   content    hash    id -> the episode, or its trajectory once it is finished
--   parked     set     ids of waiting or leased episodes that have begun
--   waiting, finished    sorted sets by place; parked ones come first
--   leased, taken        sorted sets by the time that the lease ends
--   holders    hash    id -> who has leased or taken it, or learned from it
--   learned    set
local prefix = KEYS[1]
local MOST_BYTES = 2 ^ 24
local function key(name) return prefix .. name end

local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function place(id)
  local number = tonumber(redis.call('HGET', key('numbers'), id))
  if redis.call('SISMEMBER', key('parked'), id) == 1 then return number - 1e15 end
  return number
end

-- Leases that have run out.
local function expire(leases, back)
  local ended = redis.call('ZRANGE', key(leases), '-inf', now(), 'BYSCORE')
  for _, id in ipairs(ended) do
    redis.call('ZREM', key(leases), id)
    redis.call('ZADD', key(back), place(id), id)
  end
end

-- From the `first` argument on: ids, `more` words after each, and its content.
local function pieces(first, more)
  local ids, contents = {}, {}
  for i = first, #ARGV, 2 + more do
    ids[#ids + 1] = ARGV[i]
    contents[#contents + 1] = ARGV[i + 1 + more]
  end
  return ids, contents
end

-- Numbers for those that have none; `numbers` is of `ids`, with false for such.
local function number(ids, numbers)
  local new, given = {}, {}
  for i, id in ipairs(ids) do
    if not numbers[i] and not given[id] then
      given[id] = true
      new[#new + 1] = id
    end
  end
  if #new == 0 then return given end
  local last, pairs_of = redis.call('INCRBY', key('number'), #new), {}
  for i, id in ipairs(new) do
    given[id] = last - #new + i
    pairs_of[2 * i - 1], pairs_of[2 * i] = id, given[id]
  end
  redis.call('HSET', key('numbers'), unpack(pairs_of))
  return given
end

local function begin()
  if redis.call('GET', key('source')) == ARGV[1] then return 0 end
  local forgotten = redis.call('HLEN', key('content'))
  for _, name in ipairs({'numbers', 'content', 'parked', 'waiting', 'finished', 'leased', 'taken', 'holders',
                         'learned'}) do
    redis.call('UNLINK', key(name))
  end
  redis.call('SET', key('source'), ARGV[1])
  return forgotten
end

local function add()
  local ids, contents = pieces(1, 0)
  local new = number(ids, redis.call('HMGET', key('numbers'), unpack(ids)))
  local count, put, places = 0, {}, {}
  for i, id in ipairs(ids) do
    if new[id] then
      put[#put + 1], put[#put + 2] = id, contents[i]
      places[#places + 1], places[#places + 2] = new[id], id
      new[id], count = nil, count + 1
    end
  end
  if count > 0 then
    redis.call('HSET', key('content'), unpack(put))
    redis.call('ZADD', key('waiting'), unpack(places))
  end
  return count
end

-- The contents of the first ones, but for the first no more than MOST_BYTES.
local function give(from, leases)
  expire(leases, from)
  local ids, sizes = redis.call('ZRANGE', key(from), 0, tonumber(ARGV[1]) - 1), 0
  local given, ends_at, holders, ends = {}, {}, {}, now() + tonumber(ARGV[3])
  for i, id in ipairs(ids) do
    sizes = sizes + redis.call('HSTRLEN', key('content'), id)
    if i > 1 and sizes > MOST_BYTES then break end
    given[i] = id
    ends_at[2 * i - 1], ends_at[2 * i] = ends, id
    holders[2 * i - 1], holders[2 * i] = id, ARGV[2]
  end
  if #given == 0 then return {} end
  redis.call('ZREM', key(from), unpack(given))
  redis.call('ZADD', key(leases), unpack(ends_at))
  redis.call('HSET', key('holders'), unpack(holders))
  return redis.call('HMGET', key('content'), unpack(given))
end

local function lease() return give('waiting', 'leased') end

local function take() return give('finished', 'taken') end

local function held(leases, back, change)
  local count = 0
  for _, id in ipairs(redis.call('ZRANGE', key(leases), 0, -1)) do
    if redis.call('HGET', key('holders'), id) == ARGV[1] then
      change(leases, back, id)
      count = count + 1
    end
  end
  return count
end

local function renew()
  expire('leased', 'waiting')
  expire('taken', 'finished')
  local ends = now() + tonumber(ARGV[2])
  local function longer(leases, _, id) redis.call('ZADD', key(leases), ends, id) end
  return held('leased', 'waiting', longer) + held('taken', 'finished', longer)
end

local function release()
  local function back_to(leases, back, id)
    redis.call('ZREM', key(leases), id)
    redis.call('HDEL', key('holders'), id)
    redis.call('ZADD', key(back), place(id), id)
  end
  return held('leased', 'waiting', back_to) + held('taken', 'finished', back_to)
end

local function park()
  local holder, seconds = ARGV[1], tonumber(ARGV[2])
  local ids, contents = pieces(3, 1)
  for i, id in ipairs(ids) do
    local open = redis.call('ZSCORE', key('leased'), id) or redis.call('ZSCORE', key('waiting'), id)
    if open and redis.call('HGET', key('holders'), id) == holder then
      redis.call('HSET', key('content'), id, contents[i])
      if ARGV[3 * i + 1] == '1' then redis.call('SADD', key('parked'), id) end
      redis.call('ZREM', key('leased'), id)
      redis.call('ZREM', key('waiting'), id)
      if seconds > 0 then
        redis.call('ZADD', key('leased'), now() + seconds, id)
      else
        redis.call('HDEL', key('holders'), id)
        redis.call('ZADD', key('waiting'), place(id), id)
      end
    end
  end
  return 0
end

local function finish()
  local ids, contents = pieces(1, 0)
  local learned = redis.call('SMISMEMBER', key('learned'), unpack(ids))
  local finished = redis.call('ZMSCORE', key('finished'), unpack(ids))
  local taken = redis.call('ZMSCORE', key('taken'), unpack(ids))
  local numbers = redis.call('HMGET', key('numbers'), unpack(ids))
  local unasked = number(ids, numbers)
  local new, seen, put, places = {}, {}, {}, {}
  for i, id in ipairs(ids) do
    if learned[i] == 0 and not finished[i] and not taken[i] and not seen[id] then
      seen[id] = true
      new[#new + 1] = id
      put[#put + 1], put[#put + 2] = id, contents[i]
      places[#places + 1], places[#places + 2] = numbers[i] or unasked[id], id
    end
  end
  if #new > 0 then
    for _, name in ipairs({'waiting', 'leased'}) do redis.call('ZREM', key(name), unpack(new)) end
    redis.call('SREM', key('parked'), unpack(new))
    redis.call('HDEL', key('holders'), unpack(new))
    redis.call('HSET', key('content'), unpack(put))
    redis.call('ZADD', key('finished'), unpack(places))
  end
  return #new
end

-- The places, from 1, of those that somebody else has.
local function ack()
  local ids = {unpack(ARGV, 2)}
  local holders = redis.call('HMGET', key('holders'), unpack(ids))
  local learned = redis.call('SMISMEMBER', key('learned'), unpack(ids))
  local taken = redis.call('ZMSCORE', key('taken'), unpack(ids))
  local finished = redis.call('ZMSCORE', key('finished'), unpack(ids))
  local new, others = {}, {}
  for i, id in ipairs(ids) do
    if holders[i] == ARGV[1] and (taken[i] or finished[i]) then
      new[#new + 1] = id
    elseif holders[i] ~= ARGV[1] or learned[i] == 0 then
      others[#others + 1] = i
    end
  end
  if #new > 0 then
    for _, name in ipairs({'taken', 'finished'}) do redis.call('ZREM', key(name), unpack(new)) end
    redis.call('HDEL', key('content'), unpack(new))
    redis.call('SADD', key('learned'), unpack(new))
  end
  return others
end

local function drop()
  for _, id in ipairs(ARGV) do
    if redis.call('SISMEMBER', key('learned'), id) == 0 then
      for _, name in ipairs({'waiting', 'leased', 'finished', 'taken'}) do redis.call('ZREM', key(name), id) end
      redis.call('SREM', key('parked'), id)
      for _, name in ipairs({'numbers', 'content', 'holders'}) do redis.call('HDEL', key(name), id) end
    end
  end
  return 0
end

local function counts()
  expire('leased', 'waiting')
  return {redis.call('ZCARD', key('waiting')), redis.call('ZCARD', key('leased')),
          redis.call('ZCARD', key('finished')) + redis.call('ZCARD', key('taken')),
          redis.call('SCARD', key('learned'))}
end
