"""RMSNorm and LayerNorm in front of a residual branch."""
