"""The command line: one thin module per subcommand, and no logic."""
