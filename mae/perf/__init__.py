"""How a step computes: compilation, micro-batches, memory, profiling."""
