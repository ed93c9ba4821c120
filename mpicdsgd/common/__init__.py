"""What every other package uses: errors, words, files, signals, plugins.

May import nothing of this project. Nothing here starts MPI or torch.
Begin with `errors` (what a user did wrong) and `files` (writing so that a crash leaves no half).
"""
