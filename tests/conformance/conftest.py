"""Makes the fixtures of the command line known here."""

from conftest_cli import _in_a_folder_of_its_own, cli, pair, shown

__all__ = ["_in_a_folder_of_its_own", "cli", "pair", "shown"]
