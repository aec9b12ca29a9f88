"""What is measured of one trained and exported model.

settings.py     the section `measure` of a ladder
"""
