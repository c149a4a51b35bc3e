"""The baselines that expertmesh is compared with, each at its best, behind one small interface."""
