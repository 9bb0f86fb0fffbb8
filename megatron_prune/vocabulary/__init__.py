"""Vocabularies: which tokens a corpus needs, which must stay so that every text can still be said, and the files without the rest."""
