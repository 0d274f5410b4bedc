"""The suites that ship with d2obench, one strict TOML file each; read by ``d2obench.suite.definition``."""
