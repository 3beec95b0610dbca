"""From what people have to rows of tokens: documents are read, tokenized once, kept in mapped files and packed."""
