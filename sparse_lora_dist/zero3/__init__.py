"""zero3"""
