"""One command that shows on any CUDA GPU what was written without one: parity, and the speed."""
