-- What a RedisStore does, each function in one step. KEYS[1] is the run's prefix.
--   numbers    hash    id -> its place in the order of asking
--   content    hash    id -> the episode, or its trajectory once it is finished
--   parked     set     ids of waiting or leased episodes that have begun
--   waiting, finished    sorted sets by place; parked ones come first
--   leased, taken        sorted sets by the time that the lease ends
--   holders    hash    id -> who has leased or taken it, or learned from it
--   learned    set
local prefix = KEYS[1]
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

local function numbered(id)
  if redis.call('HEXISTS', key('numbers'), id) == 0 then
    redis.call('HSET', key('numbers'), id, redis.call('INCR', key('number')))
    return true
  end
  return false
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
  local new = 0
  for i = 1, #ARGV, 2 do
    if numbered(ARGV[i]) then
      redis.call('HSET', key('content'), ARGV[i], ARGV[i + 1])
      redis.call('ZADD', key('waiting'), place(ARGV[i]), ARGV[i])
      new = new + 1
    end
  end
  return new
end

local function give(from, leases)
  expire(leases, from)
  local found = redis.call('ZPOPMIN', key(from), ARGV[1])
  local ends, given = now() + tonumber(ARGV[3]), {}
  for i = 1, #found, 2 do
    redis.call('ZADD', key(leases), ends, found[i])
    redis.call('HSET', key('holders'), found[i], ARGV[2])
    given[#given + 1] = redis.call('HGET', key('content'), found[i])
  end
  return given
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
  local holder, id, begun, content = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
  local open = redis.call('ZSCORE', key('leased'), id) or redis.call('ZSCORE', key('waiting'), id)
  if not open or redis.call('HGET', key('holders'), id) ~= holder then return 0 end
  redis.call('HSET', key('content'), id, content)
  if begun == '1' then redis.call('SADD', key('parked'), id) end
  redis.call('ZREM', key('leased'), id)
  redis.call('ZREM', key('waiting'), id)
  local seconds = tonumber(ARGV[5])
  if seconds > 0 then
    redis.call('ZADD', key('leased'), now() + seconds, id)
  else
    redis.call('HDEL', key('holders'), id)
    redis.call('ZADD', key('waiting'), place(id), id)
  end
  return 1
end

local function finish()
  local new = 0
  for i = 1, #ARGV, 2 do
    local id = ARGV[i]
    local over = redis.call('SISMEMBER', key('learned'), id) == 1 or redis.call('ZSCORE', key('finished'), id)
      or redis.call('ZSCORE', key('taken'), id)
    if not over then
      numbered(id)
      redis.call('ZREM', key('waiting'), id)
      redis.call('ZREM', key('leased'), id)
      redis.call('SREM', key('parked'), id)
      redis.call('HDEL', key('holders'), id)
      redis.call('HSET', key('content'), id, ARGV[i + 1])
      redis.call('ZADD', key('finished'), place(id), id)
      new = new + 1
    end
  end
  return new
end

local function ack()
  local acked = {}
  for i = 2, #ARGV do
    local id = ARGV[i]
    if redis.call('HGET', key('holders'), id) == ARGV[1] then
      if redis.call('ZREM', key('taken'), id) + redis.call('ZREM', key('finished'), id) > 0 then
        redis.call('HDEL', key('content'), id)
        redis.call('SADD', key('learned'), id)
      end
      if redis.call('SISMEMBER', key('learned'), id) == 1 then acked[#acked + 1] = id end
    end
  end
  return acked
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
