"From production traffic to datasets that can be trusted"
