#!/bin/bash
for file in $(cd $1 && find . -name '*.txt'); do
    cp $1/$file $2/$file
done
