"""The state-tracking tasks of arXiv 2411.12537 and DeltaProduct (arXiv 2502.10297), generated on the device."""
