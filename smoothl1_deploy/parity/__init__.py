"""Proof: cases → comparison with both references → matrix → report."""
