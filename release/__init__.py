"""What is handed to others with a mask: its certificate (JSON, HTML, PDF), a model card, and uploads to a hub.

All that is said here comes from a mask's file and card, which `mimu` reads: nothing is measured, no image is opened.
"""
