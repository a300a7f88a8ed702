"""Operations on leaves, columns of leaves and factor matrices."""
