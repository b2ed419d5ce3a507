"""What recurrent memory can and cannot do, measured: state tracking, recall, long context, language
modelling."""
