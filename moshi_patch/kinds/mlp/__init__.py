"""The kind `mlp`: TTT-MLP, a small MLP per head between attention and MLP that learns from the stream."""
