"""What memory mixing does: parity by an sLSTM block, with its recurrent matrix and without. About five
seconds."""

from openxlstm.evaluation.trial import Trial, run_trial

for model in ("slstm", "slstm-no-recurrence"):
    trial = Trial("parity", model, steps=150, batch_size=64, test_lengths=((40, 256),), test_strings=64)
    print(f"{model}: accuracy at lengths 40 to 256: {run_trial(trial)['accuracy'][0]['accuracy']:.3f}")
