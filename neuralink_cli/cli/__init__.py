"""The command line: a thin module per subcommand parses options, calls the library and prints.

Imports everything; nothing imports it.
"""
