"""Which box of each tensor a rank of an inference replica needs, in vLLM's layout. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from k2rl.checkpoint_engine.manifest import TensorSpec
from k2rl.checkpoint_engine.plan import Box

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
#: Parallel over output rows: dimension 0 is split.
_ROWS = (".gate_proj.", ".up_proj.", ".q_proj.", ".k_proj.", ".v_proj.", ".q_b_proj.", ".kv_b_proj.")
_VOCABULARY = ("embed_tokens.weight", "head.weight")
#: Parallel over input columns: dimension 1 is split.
_COLUMNS = (".o_proj.", ".down_proj.")


class Layout:
    """Tensor parallelism over `tp` ranks; with `ep` above 1, experts go whole, in runs, to `ep` ranks."""

    def __init__(self, tp: int, ep: int = 1, experts: int = 0, kv_heads: int = 0) -> None:
        self.tp, self.ep, self._experts, self._kv_heads = tp, ep, experts, kv_heads

    def box(self, spec: TensorSpec, rank: int) -> Box | None:
        """What `rank` (0 to `tp` - 1) needs of a tensor; None: nothing."""
        whole = tuple((0, length) for length in spec.shape)
        expert = _EXPERT.search(spec.name) if self.ep > 1 else None
        if expert is not None:
            mine = int(expert[1]) * self.ep // self._experts == rank * self.ep // self.tp
            return whole if mine else None
        dimension = self._dimension(spec)
        if dimension is None or dimension >= len(whole):
            return whole
        ranks = self.tp
        if self._kv_heads and (".k_proj." in spec.name or ".v_proj." in spec.name):
            # Fewer heads than ranks: several ranks hold the same head.
            ranks = min(self.tp, self._kv_heads)
            rank = rank * ranks // self.tp
        length = spec.shape[dimension]
        # Blocks of scales need not divide evenly: a block on the border goes to both.
        cut = (length * rank // ranks, -(-length * (rank + 1) // ranks))
        return (*whole[:dimension], cut, *whole[dimension + 1 :])

    def needs(self, specs: Iterable[TensorSpec], rank: int) -> dict[str, tuple[Box]]:
        """Everything that `rank` needs, as `plan_push` takes it."""
        boxes = ((spec.name, self.box(spec, rank)) for spec in specs)
        return {name: (box,) for name, box in boxes if box is not None}

    def _dimension(self, spec: TensorSpec) -> int | None:
        name = spec.name
        if any(part in name for part in _ROWS) or name.endswith(_VOCABULARY):
            return 0
        return 1 if any(part in name for part in _COLUMNS) else None
