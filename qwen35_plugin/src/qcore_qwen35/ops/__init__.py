"""Operations of the blocks: a torch reference each, faster backends beside it."""
