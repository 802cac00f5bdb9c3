"""Serving: Triton model repositories, and what is said about and to the server of one."""
