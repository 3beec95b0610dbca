"""RMSNorm in front of a residual branch."""
