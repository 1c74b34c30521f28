"""What is compared: the recommenders that are no stage of a run, and how tables name them all."""

# Those of `sdpo_jax.baselines`: name -> as a table has it, in its order.
TRADITIONAL = {
    "random": "random",
    "popularity": "popularity",
    "gru4rec": "GRU4Rec",
    "caser": "Caser",
    "sasrec": "SASRec",
    "morec": "MoRec",
}
# In results they stand where a stage's name would.
SYSTEMS = TRADITIONAL | {"chatrec": "ChatRec"}
NAMES = SYSTEMS | {"base": "base", "sft": "SFT"}
