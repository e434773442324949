"""Whether an answer does what it was told about its form."""

from rubrics.verifiers.instructions.checkers import CHECKERS, Instruction
from rubrics.verifiers.instructions.judge import InstructionJudge

__all__ = ["CHECKERS", "Instruction", "InstructionJudge"]
