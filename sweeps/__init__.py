"""What a sweep (models × folds × seeds) says: reading its runs, statistics, tables, figures."""
