"""The papers' claims at a small scale, one file a claim: `openm6 reproduce NAME`."""
