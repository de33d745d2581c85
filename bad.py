_base_ = 'bad.py'
