"""Training of Moshi with In-Place TTT: what moshi-finetune does, plus one `ttt:` section and exact resume."""
