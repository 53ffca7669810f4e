"""fewstep: distil diffusion and flow models to one to four steps, prove them, export them, serve them."""

__version__ = "0.1.0"
