"""vl_health"""
