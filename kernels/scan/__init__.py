"""The selective scan of Mamba, along one order of the tokens or several."""
