"""All settings: their keys, defaults, files, command lines and limits. Imports neither moshi nor torch."""
