"""tilecut_targets: one package a target: what it likes, what it can lower, how it writes and checks its artifact."""
