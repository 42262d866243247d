"""The look before any work: do experts fit each other and this machine, and is all there?"""
