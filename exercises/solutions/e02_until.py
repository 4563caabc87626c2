def allowed(geometry, query, key, window):
    seen = (key <= query) & (query < geometry.until[key])
    if window is not None:
        seen = seen & (geometry.position[query] - geometry.position[key] < window)
    return seen
