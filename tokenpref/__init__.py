"""Token-level preference optimisation for torchtune: TDPO, TIS-DPO and TI-DPO."""

__all__ = ["__version__"]

__version__ = "0.1.0"
