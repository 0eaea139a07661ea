"""hlora"""
