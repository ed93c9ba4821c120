"""Checkpoints: written beside training, committed by their manifest, read bit by bit.

May import `algorithms` and what is below. Begin with `manifest` (what makes a checkpoint whole),
`snapshot` (what is saved), `background_writer` (who writes it) and `reading`.
"""
