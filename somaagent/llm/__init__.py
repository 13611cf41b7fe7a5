"Language models: loading, chatting, measuring"
