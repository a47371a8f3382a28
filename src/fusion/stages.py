"""stub"""
def precompute(config): print(config); return {}
def train(config): return {"score": config.objective.lambda_clm}
def fuse(config): return {}
