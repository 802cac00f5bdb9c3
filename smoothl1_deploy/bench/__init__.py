"""How fast the loss is beside what people would run instead, on the CPU and on a GPU."""
