"""The two references: PyTorch eager (the contract) and the oracle (the truth)."""
