"""`python -m worstgroup`."""

from .cli import main

main()
