"""The instruction grammar: typed slots, how a record becomes a sequence, constraints on answers, metrics, the task
library. Nothing here imports PyTorch."""
