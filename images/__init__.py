"""From a dataset's name to pixels: specs, archives, folder trees, splits, decoding and the cache of decoded pixels.

`utils_data` is the door: whoever needs images asks there. What trains, measures or draws does not enter. No file here
imports torch when it is imported, so that `datasets` and `download` answer at once.
"""
