"""Experts for a dense model: named ones grown beside its FFNs, or experts carved out of them.

    grow    1. base     the exact form of a dense model (convert/upcycling.py), as it is; nothing of it is trained
            2. text     records by name -> rows of tokens; text of other domains for each name (streams.py)
            3. gates    rows that tell the names apart, fitted to the base's hidden states (gates.py)
            4. train    the experts and gate rows of all names, through deepopt's loop (loop.py)
            5. result   a package a name, and the base with these packages installed (grow.py)
    carve   grouping.py divides a layer's neurons, carve.py writes the model layer by layer; heal.py trains it with the
            dense model as the teacher (distil.py)
"""
