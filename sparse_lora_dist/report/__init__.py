"""What a run did, on one page: ``read.py`` reads its folder, the others draw and write."""
