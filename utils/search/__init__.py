"""A search index on disk: codes, engines, building, pages. No method and no flags in it."""
