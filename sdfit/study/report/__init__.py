"""The report: one self-contained page a model, and the index over all cards. Its arithmetic is `assets/model.js`."""
