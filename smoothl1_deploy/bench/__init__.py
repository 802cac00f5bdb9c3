"""How fast it is beside what people would run instead, measured in one process."""
